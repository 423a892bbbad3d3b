"""Common English words of five letters, in alphabetical order: what `wordle` hides and accepts."""

from __future__ import annotations

_TEXT = """
about above actor after again agree ahead alarm album alert alike alive allow alone along alter among anger angle
angry ankle apart apple apply arena argue arise armor aside asset avoid awake award aware bacon badge badly baker
basic basil beach beard beast begin being below bench berry birth black blade blame blank blast blaze blend bless
blind block blood bloom board boast bonus boost booth bound brain brake brand brass brave bread break breed brick
bride brief bring broad brook broom brown brush build bunch burst cabin cable camel candy cargo carry catch cause
cedar chain chair chalk charm chart chase cheap check cheek cheer chess chest chief child chill choir chord civic
claim class clean clear clerk cliff climb clock close cloth cloud clown coach coast coral couch count court cover
crack craft crane crash cream creek crowd crown crush curve cycle daily dairy dance delay depth diary digit diner
dodge doubt dozen draft drain drama dream dress drift drill drink drive eager eagle early earth eight elbow elder
elect empty enemy enjoy enter entry equal error essay event every exact exist extra fable faint faith false fancy
feast fence ferry fever field fifth fifty fight final first flame flash fleet flock flood floor flour fluid flute
focus force forge forty found frame fresh front frost fruit funny ghost giant given glass globe glory glove grace
grade grain grand grant grape graph grasp grass great green greet grief grill group grove guard guess guest guide
habit happy harsh haste heart heavy hedge hello honey honor horse hotel house human humor hurry ideal image index
inner input irony issue ivory jelly jewel joint judge juice kneel knife knock label labor large laser later laugh
layer learn lease least leave lemon level lever light limit linen liver local lodge logic loose lorry loyal lucky
lunar lunch magic major maker maple march marry match mayor meant medal melon mercy merge merit merry metal meter
might minor model moist money month moral motor mount mouse mouth movie music naval nerve never night noble noise
north novel nurse ocean offer often olive onion opera orbit order organ other outer owner paint panel paper party
pasta patch pause peace peach pearl pedal penny phase phone photo piano piece pilot pitch pizza place plain plane
plant plate plaza point polar porch pound power press price pride prime print prize proof proud queen quest quick
quiet quilt quite quote radio raise ranch range rapid reach react ready realm relax reply rider ridge rifle right
rigid river roast robin robot rocky rough round route royal rural salad salon sauce scale scarf scene scent scope
score scout screw sense serve seven shade shake shape share shark sharp sheep sheet shelf shell shine shirt shock
shoes shore short shout sight silly since sixth skate skill skirt slate sleep slice slide slope small smart smell
smile smoke snack snake solar solid solve sorry sound south space spade spare spark speak spear speed spell spend
spice spike spine spoon sport spray squad stack staff stage stair stale stamp stand start state steam steel steep
stick still sting stone stool store storm story stove straw strip study style sugar sunny super sweet swift swing
sword table taste teach thank theme thick thief thing think third those three throw thumb tiger tight timer title
toast today token tooth topic torch total touch tower track trade trail train treat trend trial tribe trick truck
truly trunk trust truth tulip twice uncle under union unity until upper upset urban usual valid value vapor vault
video visit vital vivid voice voter wagon waste watch water weary weigh whale wheat wheel where which while white
whole widow woman world worry worth wound wrist write wrong yacht yield young youth zebra
"""
WORDS = tuple(_TEXT.split())
