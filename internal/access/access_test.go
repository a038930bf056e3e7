package access

import "testing"

var door = Lock{Owner: "alice", Org: "acme", Keys: []Holder{{Key: "k:1@x", User: "bob"}}}

func TestMay(t *testing.T) {
	acme := func(s ...Scope) Subject { return Subject{Org: "acme", Scopes: s} }
	everything := []Action{Open, Look, Audit, Manage}
	for name, c := range map[string]struct {
		who Subject
		may []Action
	}{
		"nobody":                           {Subject{}, nil},
		"the operator":                     {Subject{Super: true}, everything},
		"the owner":                        {Subject{User: "alice"}, everything},
		"a key's holder":                   {Subject{User: "bob"}, []Action{Open, Look}},
		"another user":                     {Subject{User: "carol"}, nil},
		"the organization":                 {acme(Scopes...), everything},
		"the organization, to open":        {acme(OpenLocks), []Action{Open}},
		"the organization, to read":        {acme(ReadLocks), []Action{Look, Audit}},
		"the organization, to manage":      {acme(ManageLocks), []Action{Manage}},
		"the organization, unknown scope":  {acme("locks:all", "*"), nil},
		"another organization":             {Subject{Org: "other", Scopes: Scopes}, nil},
		"an organization named as a user":  {Subject{Org: "alice", Scopes: Scopes}, nil},
		"a user named as the organization": {Subject{User: "acme"}, nil},
	} {
		for _, a := range everything {
			want := false
			for _, m := range c.may {
				want = want || m == a
			}
			right, ok := May(c.who, a, door)
			if ok != want {
				t.Errorf("%s, action %d: %v, want %v", name, a, ok, want)
			}
			if ok && !Stands(right, door) {
				t.Errorf("%s: right %q does not stand", name, right)
			}
		}
	}
}

func TestNothingOfNobodyIsAnybodys(t *testing.T) {
	unowned := Lock{Keys: []Holder{{Key: "k", User: "bob"}}}
	for _, who := range []Subject{{}, {User: ""}, {Org: ""}, {User: "x"}, {Org: "x", Scopes: Scopes}} {
		if r, ok := May(who, Open, unowned); ok {
			t.Errorf("%+v may by %q", who, r)
		}
	}
}

// Protocol, 7: a right falls with what it names.
func TestARightFallsWithItsGround(t *testing.T) {
	for right, without := range map[Right]Lock{
		"owner:alice":   {Owner: "bob", Org: "acme", Keys: door.Keys},
		"org:acme":      {Owner: "alice", Org: "other", Keys: door.Keys},
		"key:k:1@x@bob": {Owner: "alice", Org: "acme"},
	} {
		if !Stands(right, door) {
			t.Errorf("%s does not stand", right)
		}
		if Stands(right, without) {
			t.Errorf("%s stands without its ground", right)
		}
	}
	if Stands("", door) || Stands("god:alice", door) || !Stands("super", Lock{}) {
		t.Error("an unknown right stands, or the operator's does not")
	}
}

func TestMayCreate(t *testing.T) {
	for _, c := range []struct {
		who  Subject
		want bool
	}{
		{Subject{}, false},
		{Subject{User: "alice"}, true},
		{Subject{Super: true}, true},
		{Subject{Org: "acme", Scopes: []Scope{ManageLocks}}, true},
		{Subject{Org: "acme", Scopes: []Scope{OpenLocks, ReadLocks}}, false},
	} {
		if MayCreate(c.who) != c.want {
			t.Errorf("%+v: %v", c.who, !c.want)
		}
	}
}
