"""What switching costs: the experiment of vLLM's sleep-mode article, on the user's own machine.

settings.py says what can be set, experiment.py runs the modes and writes down every visit, tables.py sums
them up beside the article's figures, charts.py draws them. probe.py asks one model what works with it.
"""
