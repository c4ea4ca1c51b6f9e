. .explore/env.sh; cp .carry/b/*.safetensors $D/; mkdir -p $D/src/more; [ -d .carry/d ] && tar x -C $D/src/more -f .carry/d/photos_more.tar; date +%T
