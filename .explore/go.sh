. .explore/env.sh; cd $R
python3 recipes/scripts/make_photos.py --source $D/src --more $D/more --output $D/photos --fashion $D/c --crops ${1:-32} --skip '*/ela_modified*' '*/graf3*' '*/aloeR.*' '*/aloeGT.*' '*/leuvenB.*' '*/aero3.*'
i=0; for g in 3 0 1; do i=$((i+1)); setsid nohup bash .explore/dino.sh $g pure T$i T$i.yaml > $W/T$i.log 2>&1 & done
date +%T
