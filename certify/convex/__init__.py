"""Certificates by convex programs: linear, dual and semidefinite ones, and by Lipschitz constants.

They bound the network in real arithmetic; with a float arithmetic, what its float execution can drift is subtracted.
"""
