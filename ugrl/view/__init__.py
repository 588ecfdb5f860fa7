"""What a run makes of each photograph: a page to look at, and the paper's figures."""
