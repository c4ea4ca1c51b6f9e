# unpack what was carried
. .explore/env.sh; mkdir -p $D/src/more $D/more $D/ort
[ -d .carry/a ] && tar x -C $D/src -f .carry/a/photos.tar
[ -d .carry/d ] && tar x -C $D/src/more -f .carry/d/photos_more.tar
[ -d .carry/b ] && cp .carry/b/*.safetensors $D/
for f in .carry/[efg]*/*.tar; do [ -f $f ] && tar x -C $D/more -f $f; done
[ -d .carry/hdr ] && cp -r .carry/hdr/onnxruntime $D/
for f in .carry/ort/ort_??; do [ -f $f ] && cp $f $D/ort/; done
ls $D $D/ort | tr '\n' ' '; date +%T
