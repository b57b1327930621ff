"""Bound propagation: intervals forward (IBP), linear rows backward (CROWN), and what each node costs."""
