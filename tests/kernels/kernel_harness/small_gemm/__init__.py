"""A matrix product for the tests of what reads machine code."""
