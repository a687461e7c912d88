# The real run, from published weights to a table. Set first what pretrained/README.md sets:
# WEIGHTS VIDEOS CAPTIONS CACHE PATHS DAVIS CLIP CONFIG CARDS OUT; and SIZE, FEW, SHORT to rehearse, else empty.
set -euo pipefail
python -m pretrained.weights $WEIGHTS
torchrun --nproc-per-node=$CARDS -m data.prepare --videos=$VIDEOS --captions=$CAPTIONS --out=$CACHE --weights=$WEIGHTS $SIZE
python -m benchmarks.plan $CONFIG --ranks=$CARDS --card=80 --weights=$WEIGHTS $SIZE $FEW
torchrun --nproc-per-node=$CARDS train.py $CONFIG --weights=$WEIGHTS --clips=$CACHE --trajectories=$PATHS --out=$OUT $SIZE $FEW
torchrun --nproc-per-node=$CARDS evaluate.py --videos=$DAVIS --weights=$WEIGHTS --ckpt=$OUT --out=$OUT/evaluation $SIZE $SHORT
python evaluate.py retake $CLIP --camera=arc_left --speed=1.5 --prompt="a street" --weights=$WEIGHTS --ckpt=$OUT --out=$OUT/retake $SIZE
python -m pretrained.weights merge $WEIGHTS $OUT $OUT/whole.safetensors
