"""What a driver decides: which trial is next, when it ends, and with which score. No Ray."""
