"""What is searched: axes, points, options, and the rules between them."""
