. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=$1; rows=$2; name=$3; shift 3
python3 recipes/scripts/accuracy.py --setting fashion --teacher $D/teacher --data torch/fashion_mnist:$D/fm --cache --rows $rows --seeds 0 --work $W/m_$name --commit $COMMIT --workers 4 --output $W/$name.json "$@"
touch $W/$name.done
