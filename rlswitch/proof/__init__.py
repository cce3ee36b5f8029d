"""The proof of a push: fingerprints of the weights, a canary, and the checks that compare both sides."""
