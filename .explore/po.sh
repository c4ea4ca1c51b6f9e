. .explore/env.sh; mkdir -p $D/ort; [ -d .carry/ort ] && cp .carry/ort/ort_?? $D/ort/ 2>/dev/null; [ -d .carry/hdr ] && cp -r .carry/hdr/onnxruntime $D/; ls $D/ort; date +%T
