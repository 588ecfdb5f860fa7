"""What the storage of a search holds, and who may write to it."""
