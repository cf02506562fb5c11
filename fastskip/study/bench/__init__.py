"""How fast policies are on a user's model and machine: everybody in turn, in one run.

Hugging Face's own model is among them, with the same weights, and so is our dense one, which all
others are held to.
"""
