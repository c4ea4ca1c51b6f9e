. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=3
echo "== throughput 1"; timeout 100 python3 recipes/scripts/throughput.py --commit $COMMIT --output $W/throughput1.json 2>&1 | tail -5
touch $W/one.done
