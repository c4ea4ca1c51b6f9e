# chain.sh GPU: trial, then the long run by the better recipe, then what is left
. .explore/env.sh; cd $R; g=$1
[ $g = 0 ] && mine=plain || mine=mixed
bash .explore/dino.sh $g pure trial_$mine trial_$mine.yaml > $W/trial$g.log 2>&1
for i in $(seq 120); do [ -f $W/trial_plain.done ] && [ -f $W/trial_mixed.done ] && break; sleep 1; done
best=$(python3 - $W <<'P'
import json,sys
def score(n):
    e=json.load(open(f"{sys.argv[1]}/trial_{n}.json"))["pure-0"]["evaluation"]
    return e["neighbour_agreement"] if "neighbour_agreement" in e else e["prefix_cosine"]["mean"]
try: print(max(("plain","mixed"),key=score))
except Exception as x: print("mixed")
P
)
echo "best $best" > $W/best$g.log
P="torch/fashion_mnist:$D/fm"
if [ $g = 0 ]; then
  bash .explore/dino.sh 0 pure long0 long_$best.yaml --fashion $P > $W/long0.log 2>&1
  bash .explore/dino.sh 0 hires long0 hires > $W/hires.log 2>&1; touch $W/hires.done
  bash .explore/dino.sh 0 stage0 long0 long_$best.yaml > $W/stage0.log 2>&1; touch $W/stage0.done
else
  bash .explore/dino.sh 1 auto long1 long_$best.yaml --fashion $P > $W/long1.log 2>&1
  bash .explore/fash.sh 1 auto fash1 --recipe .explore/fash_mixed.yaml > $W/fash1.log 2>&1
fi
