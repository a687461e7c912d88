"""One 48 GB card: as one_card_80gb.py; nothing is cut, but it takes as much longer as the card is
slower.

What `python -m benchmarks.plan config/one_card_48gb.py --card=48 --rate=80` says: 46.4 GB at the
update of 46.4 usable (conditions = 2 leaves one more); 85 network rows for a condition; 4,480
videos; 4 GB a checkpoint; 25 GB of the computer's memory; 1.39 h an iteration, so 8.1 days at 80
TFLOP/s.
"""
world = "clips"
conditions = 4
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 2
first = 6
window_per_condition = True
tail = 0.25
micro_batch = 1                    # one row fills a card
compile = True
estimator_stride = 3               # cameras of every third frame, interpolated between
park = True                        # without it the reward models' 25 GB leave no room
save_every = 5
sample_every = 20
out = "out/one_card_48gb"
