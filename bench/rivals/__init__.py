"""What users would pick today, and Weft, on the same real engines."""
