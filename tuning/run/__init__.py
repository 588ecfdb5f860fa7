"""What runs trials: one driver, Ray Tune, and the process of a trial."""
