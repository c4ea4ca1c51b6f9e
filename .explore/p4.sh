# carry e [f]: more pictures; crops; trials
. .explore/env.sh; for f in .carry/[ef]/*.tar; do tar x -C $D/more -f $f; done; cd $R
time python3 recipes/scripts/make_photos.py --source $D/src --more $D/more --output $D/photos --fashion $D/c --crops ${1:-32} --skip '*/ela_modified*' '*/graf3*' '*/aloeR.*' '*/aloeGT.*' '*/leuvenB.*' '*/aero3.*'
cp $D/photos/sources.json $OUT
setsid nohup bash .explore/dino.sh 0 pure T1 trial_T1.yaml > $W/T1.log 2>&1 &
setsid nohup bash .explore/dino.sh 1 pure T2 trial_T2.yaml > $W/T2.log 2>&1 &
sleep 1; date +%T
