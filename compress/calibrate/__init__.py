"""What the inputs of each linear look like, found out while weights stream by: no stage holds the model."""
