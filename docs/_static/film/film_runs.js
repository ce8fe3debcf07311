const FILM = {
 "prompts": [
  "a smiling woman with blond hair and eyeglasses",
  "a bald man with a mustache",
  "an older woman with gray hair",
  "a young man with black hair, wearing a hat"
 ],
 "scales": [
  1,
  3,
  6
 ],
 "seeds": [
  0,
  1
 ],
 "times": [
  999,
  949,
  899,
  849,
  799,
  749,
  699,
  649,
  599,
  549,
  499,
  449,
  399,
  349,
  299,
  249,
  199,
  149,
  99,
  49,
  -1
 ]
};
