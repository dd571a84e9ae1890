"""The commands: one module per verb; `main` parses, runs and turns errors into one line."""
