"""Several processes: what each holds, and what they tell each other."""
