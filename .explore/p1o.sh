SRC=$PWD
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .carry/whl/*.whl
rm -rf /root/repo; mkdir /root/repo; tar c --exclude .carry . | tar x -C /root/repo
. .explore/env.sh; bash .explore/p2.sh; nvidia-smi -L
(cd $R; CUDA_VISIBLE_DEVICES= setsid nohup timeout 300 python3 -c 1 &) 
