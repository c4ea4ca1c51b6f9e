# carry c t whl: install, fashion data, teacher
SRC=$PWD
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .carry/whl/*.whl
rm -rf /root/repo; mkdir /root/repo; tar c --exclude .carry . | tar x -C /root/repo
. .explore/env.sh; cp -r .carry/t $D/teacher; cd $R
cp -r $SRC/.carry/c $D/c; mkdir -p $D/fm/FashionMNIST/raw; for f in $D/c/*.gz; do gunzip -c $f > $D/fm/FashionMNIST/raw/$(basename ${f%.gz}); done
mkdir -p $D/src $D/more; nvidia-smi -L; date +%T
cd $R; for n in scale one; do setsid nohup bash .explore/$n.sh > $W/$n.log 2>&1 & done; sleep 1
