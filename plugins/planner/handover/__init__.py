"""Models and trainings for engines with pipelines: ``blockwright export RUN DIR --to ENGINE``."""
