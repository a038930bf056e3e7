package shadow_test

import (
	"strings"
	"testing"

	"github.com/openlock/openlock/internal/shadow"
)

// P is $aws/things/{thing}/shadow (classic) or $aws/things/{thing}/shadow/name/{name}.
func TestTopicsOfAnAddress(t *testing.T) {
	classic, named := shadow.Address{Thing: "door"}, shadow.Address{Thing: "door", Name: "lock"}
	for got, want := range map[string]string{
		classic.Prefix():              "$aws/things/door/shadow",
		named.Prefix():                "$aws/things/door/shadow/name/lock",
		classic.Topic("update/delta"): "$aws/things/door/shadow/update/delta",
		named.Topic("get/accepted"):   "$aws/things/door/shadow/name/lock/get/accepted",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// The device publishes P/get, P/update and P/delete, of a classic or a named shadow.
func TestParseTopicTakesEveryRequest(t *testing.T) {
	for _, a := range []shadow.Address{
		{Thing: "door"},
		{Thing: "door", Name: "lock"},
		{Thing: "shadow", Name: "name"},
		{Thing: strings.Repeat("t", 128), Name: strings.Repeat("n", 64)},
		{Thing: "a:b_c-D9"},
	} {
		for _, op := range []shadow.Operation{shadow.OpGet, shadow.OpUpdate, shadow.OpDelete} {
			got, gotOp, ok := shadow.ParseTopic(a.Topic(string(op)))
			if got != a || gotOp != op || !ok {
				t.Errorf("%s: got %v %q %v", a.Topic(string(op)), got, gotOp, ok)
			}
		}
	}
}

func TestParseTopicTakesNothingElse(t *testing.T) {
	for _, topic := range []string{
		"",
		"get",
		"$aws/things/door/shadow",
		"$aws/things/door/shadow/",
		"$aws/things/door/shadow/get/accepted",
		"$aws/things/door/shadow/update/delta",
		"$aws/things/door/shadow/put",
		"$aws/things/door/shadow/get/",
		"/$aws/things/door/shadow/get",
		"$aws/things//shadow/get",
		"$aws/things/+/shadow/get",
		"$aws/things/door/shadow/#",
		"$aws/things/a b/shadow/get",
		"$aws/things/door/Shadow/get",
		"$aws/thing/door/shadow/get",
		"aws/things/door/shadow/get",
		"$aws/things/door/shadow/name/get",
		"$aws/things/door/shadow/name//get",
		"$aws/things/door/shadow/name/+/get",
		"$aws/things/door/shadow/name/a/b/get",
		"$aws/things/door/shadow/nom/lock/get",
		"$aws/things/" + strings.Repeat("t", 129) + "/shadow/get",
		"$aws/things/door/shadow/name/" + strings.Repeat("n", 65) + "/get",
	} {
		if a, op, ok := shadow.ParseTopic(topic); ok || a != (shadow.Address{}) || op != "" {
			t.Errorf("%q: got %v %q %v", topic, a, op, ok)
		}
	}
}

// Thing name [a-zA-Z0-9:_-]{1,128}, shadow name the same to 64.
func TestNames(t *testing.T) {
	tests := []struct {
		s           string
		thing, name bool
	}{
		{"", false, false},
		{"azAZ09:_-", true, true},
		{strings.Repeat("x", 64), true, true},
		{strings.Repeat("x", 65), true, false},
		{strings.Repeat("x", 128), true, false},
		{strings.Repeat("x", 129), false, false},
		{"a/b", false, false},
		{"a+", false, false},
		{"$a", false, false},
		{"a.b", false, false},
		{"tür", false, false},
		{"a\n", false, false},
		{"a\x00", false, false},
	}
	for _, tt := range tests {
		if shadow.ValidThing(tt.s) != tt.thing || shadow.ValidName(tt.s) != tt.name {
			t.Errorf("%q: thing %v, name %v", tt.s, shadow.ValidThing(tt.s), shadow.ValidName(tt.s))
		}
	}
}
