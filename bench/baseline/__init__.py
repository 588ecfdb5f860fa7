"""The plain forms that ``bench`` compares with: the public recipe, written down again."""
