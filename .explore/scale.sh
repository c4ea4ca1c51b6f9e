. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=0,1
echo "== throughput 2"; timeout 100 torchrun --nproc-per-node 2 recipes/scripts/throughput.py --commit $COMMIT --output $W/throughput.json 2>&1 | tail -5
echo "== ddp"; date +%T; timeout 250 python3 recipes/scripts/scale_out.py --steps 100 --commit $COMMIT --output $W/scale_out.json 2>&1 | tail -8
echo "== shard"; date +%T; timeout 250 python3 recipes/scripts/scale_out.py --steps 40 --shard --commit $COMMIT --output $W/scale_out.json 2>&1 | tail -12
date +%T; touch $W/scale.done
