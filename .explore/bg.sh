# bg.sh NAME: run a script of this folder in the background
. .explore/env.sh; n=$1; setsid nohup bash .explore/$n.sh > $W/$n.log 2>&1 & sleep 0.3
