"""Eight 80 GB cards in two days: the fast recipe with 16 conditions an iteration where the paper's cards had 64.

@PLAN@
"""
world = "clips"
conditions = 16                    # two on each card; 40 take as long on cards of 400 TFLOP/s
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 1
first = 6
window_per_condition = True
tail = 0.4
micro_batch = 1                    # one row fills a card
compile = True
estimator_stride = 3               # cameras of every third frame, interpolated between
save_every = 5
out = "out/eight_cards"
