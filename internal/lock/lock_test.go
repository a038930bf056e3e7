package lock

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var now = time.Date(2026, 5, 29, 12, 0, 0, 0, time.UTC)

func TestParseID(t *testing.T) {
	for s, want := range map[string]ID{"1": 1, "123": 123, "9007199254740991": MaxID} {
		if id, err := ParseID(s); err != nil || id != want || id.String() != s {
			t.Errorf("%q: %d, %v", s, id, err)
		}
	}
	for _, s := range []string{"", "0", "01", "+1", "-1", "1.0", "1e3", " 1", "1 ", "0x1", "٣", "9007199254740992", "99999999999999999999", "1_000"} {
		if id, err := ParseID(s); !errors.Is(err, ErrID) {
			t.Errorf("%q: %d, %v", s, id, err)
		}
	}
}

func TestThingNamesComeBack(t *testing.T) {
	if id, err := OfThing(ID(123).Thing()); err != nil || id != 123 {
		t.Errorf("%d, %v", id, err)
	}
	for _, s := range []string{"", "lock-", "lock-01", "lock-x", "door-1"} {
		if _, err := OfThing(s); err == nil {
			t.Errorf("%q is taken for a lock", s)
		}
	}
}

// history applies commands one after another and fails on a refusal.
func history(t *testing.T, commands ...Command) (s State, all []Event) {
	t.Helper()
	for _, c := range commands {
		events, err := Decide(s, c, now)
		if err != nil {
			t.Fatalf("%#v: %v", c, err)
		}
		for _, e := range events {
			s = Evolve(s, e, s.Version+1, now)
		}
		all = append(all, events...)
	}
	return s, all
}

func kinds(events []Event) (names []string) {
	for _, e := range events {
		name, _ := e.Kind()
		names = append(names, name)
	}
	return names
}

func n(i int64) *int64 { return &i }

var create = Create{ID: 7, UUID: "u7", OrgID: "acme", Keys: []Key{{UUID: "k1", IndexNumber: n(1), UserID: "alice"}}}

func TestDecide(t *testing.T) {
	open := func(id CommandID) RequestOpen { return RequestOpen{Open: Open{ID: id}} }
	for name, c := range map[string]struct {
		commands []Command
		want     []string
	}{
		"create twice changes nothing": {[]Command{create, create}, []string{"LockCreated"}},
		"an owner once":                {[]Command{create, SetOwner{"bob"}, SetOwner{"bob"}}, []string{"LockCreated", "OwnerSet"}},
		"an organization once":         {[]Command{create, SetOrganization{"b"}, SetOrganization{"b"}}, []string{"LockCreated", "OrganizationSet"}},
		"a key again is nothing":       {[]Command{create, AddKey{Key{UUID: "k1", IndexNumber: n(1), UserID: "alice"}}}, []string{"LockCreated"}},
		"a key replaced":               {[]Command{create, AddKey{Key{UUID: "k1", UserID: "bob"}}}, []string{"LockCreated", "KeyAdded"}},
		"a key by number":              {[]Command{create, RemoveKey{IndexNumber: n(1)}}, []string{"LockCreated", "KeyRemoved"}},
		"opened once":                  {[]Command{create, open("a"), Report{CommandID: "a", Result: Opened}, Report{CommandID: "a", Result: Opened}}, []string{"LockCreated", "LockOpenRequested", "LockOpened"}},
		"expired is the end":           {[]Command{create, open("a"), End{CommandID: "a", Result: Expired}, End{CommandID: "a", Result: Failed}}, []string{"LockCreated", "LockOpenRequested", "LockOpenExpired"}},
		"late reports are kept once":   {[]Command{create, open("a"), End{CommandID: "a", Result: Expired}, Report{CommandID: "a", Result: Opened}, Report{CommandID: "a", Result: Opened}}, []string{"LockCreated", "LockOpenRequested", "LockOpenExpired", "OpenReportedLate"}},
		"unknown reports are nothing":  {[]Command{create, Report{CommandID: "zzz", Result: Opened}}, []string{"LockCreated"}},
		"refused and failed": {
			[]Command{create, open("a"), open("b"), Report{CommandID: "b", Result: Refused}, Report{CommandID: "a", Result: Failed}},
			[]string{"LockCreated", "LockOpenRequested", "LockOpenRequested", "LockOpenRefused", "LockOpenFailed"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, events := history(t, c.commands...); !reflect.DeepEqual(kinds(events), c.want) {
				t.Errorf("got %v, want %v", kinds(events), c.want)
			}
		})
	}
}

func TestDecideRefuses(t *testing.T) {
	made, _ := history(t, create)
	for name, c := range map[string]struct {
		state   State
		command Command
		want    error
	}{
		"anything on no lock":         {State{}, SetOwner{"bob"}, ErrUnknown},
		"an open on no lock":          {State{}, RequestOpen{}, ErrUnknown},
		"a key that is not there":     {made, RemoveKey{UUID: "k9"}, ErrUnknownKey},
		"uuid and number disagree":    {made, RemoveKey{UUID: "k1", IndexNumber: n(2)}, ErrUnknownKey},
		"another key's number":        {made, AddKey{Key{UUID: "k2", IndexNumber: n(1)}}, ErrKeyTaken},
		"a number twice when created": {State{}, Create{ID: 8, Keys: []Key{{UUID: "a", IndexNumber: n(1)}, {UUID: "b", IndexNumber: n(1)}}}, ErrKeyTaken},
	} {
		if events, err := Decide(c.state, c.command, now); !errors.Is(err, c.want) || events != nil {
			t.Errorf("%s: %v, %v", name, events, err)
		}
	}
}

func TestANewOwnerOrOrganizationReadsFromTheirOwnEventOn(t *testing.T) {
	s, _ := history(t, create, SetOwner{"bob"}, AddKey{Key{UUID: "k2"}}, SetOrganization{"b"})
	if s.OwnerSince != 2 || s.OrgSince != 4 {
		t.Errorf("owner since %d, organization since %d", s.OwnerSince, s.OrgSince)
	}
}

// Invariants 6 and 11: whatever is asked in whatever order, every command has at
// most one end, and folding what was stored gives the same state again.
func TestAnyHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := State{}
		var folded State
		ends := map[CommandID]int{}
		asked := 0
		for range rapid.IntRange(1, 80).Draw(t, "length") {
			c := anyCommand(t, &asked)
			events, err := Decide(s, c, now)
			if err != nil {
				continue
			}
			before, _ := json.Marshal(s)
			next := s
			for _, e := range events {
				if end, ok := e.(OpenEnded); ok {
					ends[end.CommandID]++
				}
				next = Evolve(next, e, next.Version+1, now)
				folded = Evolve(folded, stored(t, e), folded.Version+1, now)
			}
			if after, _ := json.Marshal(s); string(after) != string(before) {
				t.Fatalf("Evolve changed the state it was given: %s became %s", before, after)
			}
			s = next
		}
		for id, count := range ends {
			if count > 1 {
				t.Fatalf("command %s ended %d times", id, count)
			}
		}
		a, _ := json.Marshal(s)
		b, _ := json.Marshal(folded)
		if string(a) != string(b) {
			t.Fatalf("state %s, fold of what was stored %s", a, b)
		}
	})
}

func anyCommand(t *rapid.T, asked *int) Command {
	command := func() CommandID { return CommandID(fmt.Sprint(rapid.IntRange(0, *asked).Draw(t, "command"))) }
	switch rapid.IntRange(0, 7).Draw(t, "kind") {
	case 0:
		return create
	case 1:
		return SetOwner{rapid.SampledFrom([]string{"alice", "bob"}).Draw(t, "owner")}
	case 2:
		return SetOrganization{rapid.SampledFrom([]string{"a", "b"}).Draw(t, "org")}
	case 3:
		return AddKey{Key{UUID: rapid.SampledFrom([]string{"k1", "k2"}).Draw(t, "key"), UserID: "u"}}
	case 4:
		return RemoveKey{UUID: rapid.SampledFrom([]string{"k1", "k2"}).Draw(t, "key")}
	case 5:
		return Report{CommandID: command(), Result: rapid.SampledFrom([]Result{Opened, Refused, Failed}).Draw(t, "result")}
	case 6:
		return End{CommandID: command(), Result: rapid.SampledFrom([]Result{Expired, Failed}).Draw(t, "result")}
	}
	*asked++
	return RequestOpen{Open: Open{ID: CommandID(fmt.Sprint(*asked)), Right: "super", IssuedAt: 1, ExpiresAt: 2}, Reason: "r"}
}

// stored is an event as it comes back from the log.
func stored(t *rapid.T, e Event) Event {
	name, schema := e.Kind()
	data, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	var command Open
	if asked, ok := e.(OpenRequested); ok {
		command = asked.Command
	}
	var org string
	if made, ok := e.(Created); ok {
		org = made.OrgID
	}
	back, err := Decode(name, schema, data, org, command)
	if err != nil {
		t.Fatal(err)
	}
	return back
}

func TestDecodeRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, c := range []struct {
		name   string
		schema int
		data   string
	}{{"DoorPainted", 1, "{}"}, {"OwnerSet", 2, "{}"}, {"OwnerSet", 1, "["}} {
		if e, err := Decode(c.name, c.schema, []byte(c.data), "", Open{}); err == nil {
			t.Errorf("%+v: %v", c, e)
		}
	}
}
