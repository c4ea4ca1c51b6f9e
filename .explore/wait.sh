# wait.sh SECONDS NAME: wait for a script of this folder, print its log
. .explore/env.sh; for i in $(seq $1); do [ -f $W/$2.done ] && break; sleep 1; done; tail -c 9000 $W/$2.log; cp $W/*.json $OUT/; date +%T
