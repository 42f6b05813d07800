"""Attention operators. Depends on torch alone; the first operators arrive in the next release."""
