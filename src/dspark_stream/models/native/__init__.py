"""Models on the CPU's integer kernels (kernels/dspark_kernels/cpu).

Greedy text is the same, token for token, alone and in company, plain and speculated: a row's result does not depend on
the other rows of a pass.
"""
