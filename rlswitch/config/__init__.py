"""What a run can be told: every setting, its bounds and how a bad value is reported."""
