"""What the frozen parts of a model compute for each sample, computed once and read in every later pass.

Vision features of a frozen tower (the stages router and consistency), and the reference's hidden states at
answers (consistency).
"""
