"""What FLoRA and the methods beside it share: a PEFT method whose layers run with a weight that replaces their own.

A method on this base says what its parameters are and which update of the weight they make. The rest is here: several
adapters, scales, merging, magnitudes (DoRA), how a layer runs, and how PEFT finds, saves and loads it.
"""
