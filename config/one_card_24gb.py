"""One 24 GB card: 49 frames of 368x640 in place of 81 of 480x832, and no HPSv3.

The base was trained on the larger ones, so its pictures are worse to begin with, and long paths are not seen;
HPSv3's 15.5 GB do not fit beside the optimiser, so nothing looks at single frames' beauty: watch the samples.
@PLAN@
"""
world = "clips"
frames = 49
height = 368
width = 640
conditions = 4
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 1
first = 6
window_per_condition = True
tail = 0.4
micro_batch = 1                    # one row fills a card
compile = True
rewards = "trans=1,rot=1,vq=1,mq=1"
estimator_stride = 3               # cameras of every third frame, interpolated between
park = True                        # reward models visit the card one at a time
save_every = 5
sample_every = 20
out = "out/one_card_24gb"
