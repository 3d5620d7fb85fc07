"""Optimizers to compare against that no kept package has in the form their papers give them."""
