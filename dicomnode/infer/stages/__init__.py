"""The steps of manifest schema 2: named, with typed parameters, between a volume and its results.

Before the network a step maps a Frame to a Frame and leaves on it how to be undone; behind
the network the decision (argmax, threshold) brings everything back onto the source grid.
"""
