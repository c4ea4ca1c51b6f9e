# dino.sh GPU ROWS NAME RECIPE [more]: a results file and a folder of its own
. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=$1; rows=$2; name=$3; recipe=$4; shift 4
[ -f .explore/$recipe ] && recipe=.explore/$recipe
python3 recipes/scripts/accuracy.py --setting dinov2 --teacher dinov2_small --teacher-weights $D/dinov2_small.safetensors --data $D/photos --cache --commit $COMMIT --workers 14 --work $W/m_$name --output $W/$name.json --recipe $recipe --rows $rows "$@"
touch $W/$name.done
