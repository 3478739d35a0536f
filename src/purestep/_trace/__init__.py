"""From a leaf function to a program: recorded, rewritten, and written out as operations on lists of tensors."""
