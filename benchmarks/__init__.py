"""Every claim the project makes, as a program that prints a table and writes results/NAME.json. Not part of the
product.
"""
