"""TimeGroupSelect: for each row of a batch the table's entry of its own group of timesteps."""
