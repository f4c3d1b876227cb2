"""The inner side of `t2runtime.sandbox`: what runs in its processes. Imports the standard library
only, and little of it: these processes start once per graded answer.
"""
