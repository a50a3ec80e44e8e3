"""Agent programs of common frameworks, unmodified: `python DRIVER.py BASE_URL MODEL` prints what the framework says it did."""
