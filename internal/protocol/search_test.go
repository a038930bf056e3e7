package protocol

import (
	"fmt"
	"strings"
	"testing"
)

type node struct {
	state state
	from  int32
	by    action
}

// search goes through every reachable state, nearest first, until one breaks an
// invariant. trace is the shortest way there, empty if there is none.
func search(r rules, visit func(state)) (states int, trace string) {
	var nodes []node
	known := map[state]struct{}{}
	add := func(from int32, by action, s state) {
		if _, old := known[s]; !old {
			known[s] = struct{}{}
			nodes = append(nodes, node{s, from, by})
		}
	}
	add(none, action{"client asks for", 0}, start())
	for at := 0; at < len(nodes); at++ {
		if what := nodes[at].state.broken(); what != "" {
			return len(nodes), tell(nodes, int32(at)) + "broken: " + what
		}
		visit(nodes[at].state)
		r.next(nodes[at].state, func(by action, to state) { add(int32(at), by, to) })
	}
	return len(nodes), ""
}

// tell is the way to a state, a step a line.
func tell(nodes []node, at int32) string {
	var lines []string
	for ; at != none; at = nodes[at].from {
		n := nodes[at]
		lines = append([]string{fmt.Sprintf("  tick %d  %s", n.state.now, n.by)}, lines...)
	}
	return strings.Join(lines, "\n") + "\n"
}

// Invariants 1 to 7 hold in every state that is reachable with two commands,
// and the search does come to the places where they are in danger.
func TestTheProtocolKeepsItsInvariants(t *testing.T) {
	reached := map[string]int{}
	states, trace := search(rules{}, func(s state) {
		for name, is := range places {
			if is(s) {
				reached[name]++
			}
		}
	})
	if trace != "" {
		t.Errorf("a way to break it:\n%s", trace)
	}
	for name := range places {
		if reached[name] == 0 {
			t.Errorf("never reached: %s", name)
		}
	}
	t.Logf("%d states; of them %v", states, reached)
}

var places = map[string]func(state) bool{
	"both doors opened, both clients know":  func(s state) bool { return s.cmd[0].was(opened, got200) && s.cmd[1].was(opened, got200) },
	"opened, though nobody knows":           func(s state) bool { return s.cmd[0].was(unknown, got502) && s.cmd[0].moved == 1 },
	"200, and the door stayed shut":         func(s state) bool { return s.cmd[0].was(expired, got200) && s.cmd[0].moved == 0 },
	"in the shadow after its 502":           func(s state) bool { return s.cmd[0].told502 && s.desired == 0 },
	"a call on its way after its 502":       func(s state) bool { return s.cmd[0].told502 && s.cmd[0].copies > 0 },
	"moving for a command that was closed":  func(s state) bool { return s.cmd[0].outcome == expired && s.bolt == 0 },
	"an older command replaces a newer one": func(s state) bool { return s.desired == 0 && s.cmd[1].applied },
	"a retry opened, the first did not":     func(s state) bool { return s.same && s.cmd[1].was(opened, got200) && s.cmd[0].recorded },
}

func (c command) was(outcome, client int8) bool { return c.outcome == outcome && c.client == client }

// Each rule is needed: without it there is a way to break an invariant.
func TestEachRuleIsNeeded(t *testing.T) {
	for name, c := range map[string]struct {
		rules  rules
		breaks string
	}{
		"call before the intent is durable":          {rules{callsFirst: true}, "2:"},
		"200 before the intent is durable":           {rules{answersFirst: true}, "4:"},
		"an unanswered call's requestId is released": {rules{releasesUnknown: true}, "3:"},
		"automatic retry of the call":                {rules{retriesCalls: true}, "5:"},
		"502 at once for an unanswered call":         {rules{hasty502: true}, "5:"},
		"unanswered call waited for":                 {rules{waitsForReply: true}, "6:"},
		"recovery sends again":                       {rules{recoverySends: true}, "5:"},
		"clear without condition":                    {rules{clearsAnything: true}, "clearing"},
		"acceptance taken for an opening":            {rules{acceptedIsOpen: true}, "7:"},
		"device without expiry check":                {rules{ignoresExpiry: true}, "1:"},
		"device checks when it arrives":              {rules{checksEarly: true}, "1:"},
		"device that forgets what it has seen":       {rules{forgets: true}, "3:"},
	} {
		states, trace := search(c.rules, func(state) {})
		if !strings.Contains(trace, "broken: "+c.breaks) {
			t.Errorf("%s: want a way to break %q, in %d states: %s", name, c.breaks, states, trace)
		}
		t.Logf("%s: found after %d states\n%s", name, states, trace)
	}
}
