# poll.sh SECONDS NAMES...: waits until one more of the names is done, at most so long
. .explore/env.sh; n=$1; shift; ls $W/*.log > /dev/null 2>&1 || { echo "no state"; exit 1; }
for i in $(seq $n); do all=1; for f in "$@"; do [ -f $W/$f.done ] || all=0; done; [ $all = 1 ] && break; sleep 1; done
cp $W/*.json $OUT/ 2>/dev/null
for l in $W/*.log; do echo "== $l"; grep -h "after \|blocks to keep\|Error\|error" $l | tail -6 | cut -c1-230; tail -c 200 $l | tr '\r' '\n' | tail -1; done
python3 - $W <<'P'
import json,glob,sys
for p in sorted(glob.glob(sys.argv[1]+"/*.json")):
    try: d=json.load(open(p))
    except Exception: continue
    for k,r in d.items():
        if not isinstance(r,dict) or "evaluation" not in r: continue
        e=r["evaluation"]; f=e.get("fashion",{})
        print(p.split("/")[-1],k,"min",r["minutes"],"top1",e.get("top1"),"cls",e.get("prefix_cosine",{}).get("mean"),"patch",e.get("patch_cosine",{}).get("mean"),"nb",[v for q,v in e.items() if "neigh" in q], {q:v for q,v in f.items() if "knn" in q or "linear" in q}, r.get("kept_layers"), {s["stage"]:round(s["seconds"]) for s in r["stages"]})
P
date +%T
for n in scale one ort go; do [ -f $W/$n.log ] && { echo "==== $n"; tail -c 2500 $W/$n.log | tr '\r' '\n' | tail -30; }; done
