. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=0,1
timeout 100 torchrun --nproc-per-node 2 recipes/scripts/throughput.py --commit $COMMIT --output $W/throughput.json 2>&1 | tail -5
