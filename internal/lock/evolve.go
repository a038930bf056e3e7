package lock

import (
	"slices"
	"time"
)

// Evolve folds one event into the state. It is pure: the slices of s are never
// changed in place. version is the event's own, at its own time.
func Evolve(s State, e Event, version int64, at time.Time) State {
	s.Version, s.UpdatedAt = version, at.UnixMilli()
	switch e := e.(type) {
	case Created:
		s.created(e)
	case OwnerSet:
		s.OwnerID, s.OwnerSince = e.UserID, version
	case OrganizationSet:
		s.OrgID, s.OrgSince = e.OrgID, version
	case KeyAdded:
		s.Keys = append(s.without(e.KeyUUID), Key{UUID: e.KeyUUID, IndexNumber: e.KeyIndexNumber, UserID: e.UserID})
	case KeyRemoved:
		s.Keys = s.without(e.KeyUUID)
	case OpenRequested:
		s.Pending = append(slices.Clone(s.Pending), e.Command)
	case OpenEnded:
		s.end(e)
	case OpenReportedLate:
		s.Ended = slices.Clone(s.Ended)
		for i := range s.Ended {
			s.Ended[i].Late = s.Ended[i].Late || s.Ended[i].ID == e.CommandID
		}
	}
	return s
}

func (s *State) created(e Created) {
	s.ID, s.UUID, s.SerialNumber = e.LockID, e.UUID, e.SerialNumber
	s.OwnerID, s.OrgID = e.OwnerID, e.OrgID
	s.ThingName, s.ThingARN = e.ThingName, e.ThingARN
	s.OwnerSince, s.OrgSince = s.Version, s.Version
	for _, k := range e.Keys {
		s.Keys = append(s.without(k.UUID), k)
	}
}

func (s *State) end(e OpenEnded) {
	s.Pending = slices.DeleteFunc(slices.Clone(s.Pending), func(o Open) bool { return o.ID == e.CommandID })
	ended := append(slices.Clone(s.Ended), Ended{ID: e.CommandID, Result: e.Result})
	s.Ended = ended[max(0, len(ended)-endedKept):]
}

func (s *State) without(keyUUID string) []Key {
	return slices.DeleteFunc(slices.Clone(s.Keys), func(k Key) bool { return k.UUID == keyUUID })
}
